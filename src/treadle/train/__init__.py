"""What trains adapters: supervised fine-tuning of the B of one family."""
