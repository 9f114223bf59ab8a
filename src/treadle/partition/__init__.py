"""LoRA-PAR's regions: which parameters matter to which system, and what of them each may train."""
