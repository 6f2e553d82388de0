"""The referee: can the words be believed? By the model itself, beside the text, clause by clause, claim by claim."""
