"""Silent failures of supervised fine-tuning: small inputs with their right values, run on several libraries."""
