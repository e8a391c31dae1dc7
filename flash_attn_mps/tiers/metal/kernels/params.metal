// What a launch tells a kernel: one array of 64-bit integers, filled by the host in the order of these names.
// Strides count elements. Floats travel as their bits.

enum Param {
  SEQLEN_Q,  // queries and keys of a sequence, where the batch is dense
  SEQLEN_K,
  BATCH,     // sequences
  GROUP,     // query heads per kv head
  Q_BATCH,   // strides; a packed batch has none of its own
  Q_ROW,
  Q_HEAD,
  K_BATCH,
  K_ROW,
  K_HEAD,
  V_BATCH,
  V_ROW,
  V_HEAD,
  O_BATCH,
  O_ROW,
  O_HEAD,
  LSE_BATCH,
  LSE_HEAD,
  LEFT,      // window_size, where that side is closed
  RIGHT,
  SCALE,     // softmax_scale, float bits
  SOFTCAP,   // float bits
  ALIBI_BATCH,
  PAGE_SIZE,
  TABLE_ROW,
  MASK_BATCH,
  MASK_HEAD,
  MASK_ROW,
  MASK_COLUMN
};

METAL_FUNC float as_float(long bits) {
  return as_type<float>(int(bits));
}
