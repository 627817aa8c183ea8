"""The application: configuration, workspace, the cycle from block to live version, scheduler and CLI."""
