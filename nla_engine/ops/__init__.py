"""Operations on tensors, one stem for reference, fast versions, dispatch, test and benchmark."""
