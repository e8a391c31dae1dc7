"""Programs in many styles, written for these tests: what their code shows about the flash_attn that they expect."""
