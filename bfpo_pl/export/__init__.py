"""From the weights of a run to a Hugging Face folder: reading them, writing the folder, and its model card."""
