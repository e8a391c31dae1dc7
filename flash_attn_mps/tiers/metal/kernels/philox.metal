// What dropout drops: a function of seed, sequence, head, query and key alone, so that neither tiles, variants and layouts nor the
// pass change it. flash_attn_mps/philox.py has the definition, and computes the same in PyTorch.

#if HAS_DROPOUT
METAL_FUNC uint4 philox4x32(uint4 counter, uint2 key) {
  for (int round = 0; round < 7; ++round) {
    uint high0 = mulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    uint high1 = mulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key += uint2(0x9E3779B9u, 0xBB67AE85u);
  }
  return counter;
}

struct Dropout {
  uint2 seed;
  uint head;       // of all heads of all sequences
  uint threshold;  // a key is dropped if its 16 random bits are less
  float scale;     // 1 / (1 - p), of what is left

  // Bit i: is the score of the query `row` and the key 8 eight + i kept?
  METAL_FUNC uint kept_of_eight(int row, int eight) const thread {
    uint4 random = philox4x32(uint4(uint(eight), uint(row), head, 0u), seed);
    uint bits = 0;
    for (int i = 0; i < 4; ++i) {
      bits |= uint((random[i] & 65535u) >= threshold) << (2 * i);
      bits |= uint((random[i] >> 16) >= threshold) << (2 * i + 1);
    }
    return bits;
  }

  METAL_FUNC bool keeps(int row, int key) const thread { return kept_of_eight(row, key / 8) >> (key % 8) & 1; }
  METAL_FUNC float scaled(float x) const thread { return x * scale; }
};
#else
struct Dropout {
  METAL_FUNC bool keeps(int, int) const thread { return true; }
  METAL_FUNC float scaled(float x) const thread { return x; }
};
#endif

METAL_FUNC Dropout dropout_of(Sequence sequence, int head, Inputs in) {
  Dropout dropout;
#if HAS_DROPOUT
  constant long* params = in.params;
  dropout.seed = uint2(uint(params[SEED]), uint(params[SEED] >> 32));
  dropout.head = uint(sequence.batch * int(params[HEADS]) + head);
  dropout.threshold = uint(params[DROPOUT_THRESHOLD]);
  dropout.scale = as_float(params[DROPOUT_SCALE]);
#endif
  return dropout;
}
