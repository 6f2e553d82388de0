"""The bundled demo trio (base model, verbalizer, reconstructor), its problems and its training recipe."""
