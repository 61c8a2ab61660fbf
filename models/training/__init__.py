"""How the `tiny` text-to-image model is made: photos, captions, networks, judgement."""
