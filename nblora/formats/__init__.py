"""Files: checkpoints, PEFT adapters, safetensors."""
