# Written by stubs/make.py.
from flash_attn.utils.distributed import all_reduce as all_reduce
from flash_attn.utils.distributed import reduce_scatter as reduce_scatter
from flash_attn_shim.presents.flash_attn.modules.embedding import BertEmbeddings as BertEmbeddings
from flash_attn_shim.presents.flash_attn.modules.embedding import ColumnParallelEmbedding as ColumnParallelEmbedding
from flash_attn_shim.presents.flash_attn.modules.embedding import GPT2Embeddings as GPT2Embeddings
from flash_attn_shim.presents.flash_attn.modules.embedding import ParallelGPT2Embeddings as ParallelGPT2Embeddings
from flash_attn_shim.presents.flash_attn.modules.embedding import VocabParallelEmbedding as VocabParallelEmbedding
from flash_attn_shim.presents.flash_attn.modules.embedding import _positions as _positions
