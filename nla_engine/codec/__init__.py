"""Row codecs: a vector as int8, int4 or bfloat16 codes, and back."""
