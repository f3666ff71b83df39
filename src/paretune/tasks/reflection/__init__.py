"""The reflection task: answers of a counsellor, with a small model that ships and three objectives."""
