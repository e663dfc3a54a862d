"""The Triton kernel lands here."""
