"""Operations of a step on a CPU, as MAX's graph calls them."""
from .attention import Attention
from .embedding import Embedding
from .linear import Linear, LinearAdd, NormedGated, NormedLinear
