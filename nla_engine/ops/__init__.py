"""Operations on tensors, one stem for reference, fast versions, dispatch, test and benchmark."""

from nla_engine.ops.triton_cache import find_place

find_place()
