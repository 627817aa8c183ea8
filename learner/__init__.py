"""One differentially private LoRA round: blocks in, one adapter out."""
