"""The text-to-image pipelines of diffusers behind one small interface; sole importer of diffusers.

`loading.load_family` reads a folder, `family.Family` is the interface, and each kind of model has
its own adapter. What an adapter knows is how its pipeline wants captions, noise and latents.
"""
