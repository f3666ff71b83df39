"""Other people's training engines: what lets a person, or a recipe, train with them what Paretune describes."""

__all__: list[str] = []
