"""Gate sets, metrics, gates and the signed verdict on a candidate."""
