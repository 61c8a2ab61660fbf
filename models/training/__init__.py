"""How the `tiny` text-to-image model is made: photos, captions, autoencoder, diffusion, judgement."""
