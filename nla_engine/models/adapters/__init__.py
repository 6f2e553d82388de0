"""Low-rank adapters (PEFT's LoRA and rsLoRA): what they say of themselves, and the exact product into their base."""
