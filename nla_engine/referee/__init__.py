"""The referee: can the words be believed, and by what measure? So far: what the model does with a reconstruction."""
