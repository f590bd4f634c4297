"""What the commands do: a recipe, its training, the folder of a run, and what is said on screen."""
