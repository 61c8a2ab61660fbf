"""Text-to-image generation as a service: prompts in, sealed shards out."""
