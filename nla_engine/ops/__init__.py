"""Operations on tensors. Reference, fast versions, dispatch, test and benchmark of each share one stem."""

from nla_engine.ops.triton_cache import find_place

find_place()
