"""One training from its first step to its last: the loop, its log and checkpoints, looks at validation prompts, warnings in words."""
