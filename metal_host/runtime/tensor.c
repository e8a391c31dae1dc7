// Cooperative tensors: where each thread's elements are, and what the threads of a scope compute together.
//
// Metal leaves the placement to the implementation: it is a parameter of the launch. "apple10" and "legacy" are those
// of Apple's GPUs, where they are known: 16x32x16 and 32x32x32 of one simdgroup; other sizes go on in the same way.
// Every other number draws a placement that the interface allows: elements in any order over threads and slots, more
// slots than elements, other layouts for other operands and types.
#include "runtime.h"

enum { LAYOUTS = 256, POOL = 1 << 20, DENSE = 1 << 16 };
enum { INVALID = 0xffffffff, NAN_WORD = 0x7fc00000, POISON = 0x80808080 };
enum role { LEFT, RIGHT, DESTINATION, ROWS, COLUMNS, LINEAR };  // include/msl/cooperative_tensor.h

// What the header packs into a key.
struct shape {
  enum role role;
  bool transposed;  // the operand is stored as the transpose of what the product takes
  uint32_t columns, rows, threads;
};

struct mh_layout {
  uint64_t key;
  struct shape shape;
  uint32_t capacity;  // slots of a thread
  uint32_t* slots;    // [thread][slot] -> row * columns + column, or INVALID
};

static struct mh_layout layouts[LAYOUTS];
static uint32_t layout_count, pool_used, pool[POOL];
static uint64_t random_state;

void mh_forget_layouts(void) { layout_count = pool_used = 0; }

static uint32_t draw(uint32_t below) {  // xorshift64*
  random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
  return (uint32_t)((random_state * 0x2545F4914F6CDD1Dull) >> 32) % below;
}
static void seed(uint64_t a, uint64_t b) {
  random_state = (a * 0x9E3779B97F4A7C15ull) ^ (b + 0x632BE59BD9B4E019ull) * 0xD6E8FEB86659FD93ull;
  random_state |= !random_state;
  for (int i = 0; i < 8; ++i) draw(2);
}
static uint32_t drawn(void) {  // 0: a layout of Apple's
  return mh.launch->layout < MH_LAYOUT_SEEDS ? 0 : mh.launch->layout - MH_LAYOUT_SEEDS + 1;
}

// Half of the drawn layouts place destinations, left and right operands of one shape alike, so that a destination can
// be the next product's operand; and give each thread the reductions of the rows and columns that it holds.
static bool alike(void) { return drawn() % 2 == 0; }

static uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
static uint32_t bit(uint32_t lane, int at) { return lane >> at & 1; }

// The row and column of a thread's slot of a 2-d tensor, by the maps of Apple's GPUs. May lie outside the tensor.
static void apple_place(const struct shape* s, uint32_t thread, uint32_t slot, uint32_t* row, uint32_t* column) {
  bool legacy = mh.launch->layout == MH_LAYOUT_LEGACY, swap = legacy && s->transposed;
  uint32_t lane = thread % MH_LANES, rows = swap ? s->columns : s->rows, columns = swap ? s->rows : s->columns;
  uint32_t across = ceil_div(columns, 16), fragments = ceil_div(rows, 16) * across, simdgroups = s->threads / MH_LANES;
  uint32_t down = bit(lane, 4) << 2 | bit(lane, 2) << 1 | bit(lane, 1), right = bit(lane, 3) << 1 | bit(lane, 0);
  uint32_t r, c;
  if (legacy && simdgroups == 1) {  // 8x8 tiles, row by row
    uint32_t tile = slot / 2;
    r = tile / (2 * across) * 8 + down, c = tile % (2 * across) * 8 + right * 2 + slot % 2;
  } else {  // 16x16 fragments, row by row
    uint32_t fragment = thread / MH_LANES * ceil_div(fragments, simdgroups) + slot / 8, at = slot % 8;
    r = fragment / across * 16 + down + at / 4 * 8;
    c = fragment % across * 16 + (legacy ? right * 2 + at % 2 + at / 2 % 2 * 8 : right * 4 + at % 4);
    if (fragment >= fragments) r = rows;
  }
  *row = swap ? c : r, *column = swap ? r : c;
}

static uint32_t apple_capacity(const struct shape* s) {
  return 8 * ceil_div(ceil_div(s->rows, 16) * ceil_div(s->columns, 16), s->threads / MH_LANES);
}

static uint32_t* take(uint32_t count) {
  if (pool_used + count > POOL) __builtin_trap();
  pool_used += count;
  return &pool[pool_used - count];
}

static void shuffle(uint32_t* values, uint32_t count) {
  for (uint32_t i = count; i > 1; --i) {
    uint32_t j = draw(i), kept = values[j];
    values[j] = values[i - 1], values[i - 1] = kept;
  }
}

static void draw_tensor(struct mh_layout* layout) {
  const struct shape* s = &layout->shape;
  uint32_t elements = s->rows * s->columns;
  if (s->threads == 1) {
    layout->capacity = elements;
  } else {
    layout->capacity = ceil_div(elements, s->threads);
    if (draw(4)) layout->capacity += draw(2 * apple_capacity(s) - layout->capacity + 1);
  }
  uint32_t count = layout->capacity * s->threads;
  layout->slots = take(count);
  for (uint32_t i = 0; i < count; ++i) layout->slots[i] = i < elements ? i : INVALID;
  shuffle(layout->slots, count);
}

static void place_tensor(struct mh_layout* layout) {
  const struct shape* s = &layout->shape;
  layout->capacity = s->threads == 1 ? s->rows * s->columns : apple_capacity(s);
  layout->slots = take(layout->capacity * s->threads);
  for (uint32_t t = 0; t < s->threads; ++t)
    for (uint32_t i = 0; i < layout->capacity; ++i) {
      uint32_t row = i / s->columns, column = i % s->columns;
      if (s->threads > 1) apple_place(s, t, i, &row, &column);
      bool valid = row < s->rows && column < s->columns;
      layout->slots[t * layout->capacity + i] = valid ? row * s->columns + column : INVALID;
    }
}

// One element for each row (or column) of a destination: columns x rows is the destination's shape.
static void place_reduction(struct mh_layout* layout) {
  const struct shape* s = &layout->shape;
  bool by_rows = s->role == ROWS;
  uint32_t count = by_rows ? s->rows : s->columns, padded = ceil_div(count, 16) * 16;
  if (drawn()) {
    layout->capacity = alike() ? padded : ceil_div(count, s->threads) + draw(2);
    layout->slots = take(layout->capacity * s->threads);
    for (uint32_t i = 0; i < layout->capacity * s->threads; ++i) {
      uint32_t element = alike() ? i % padded : i;
      layout->slots[i] = element < count ? element : INVALID;
    }
    if (!alike()) shuffle(layout->slots, layout->capacity * s->threads);
    for (uint32_t t = 0; alike() && t < s->threads; ++t) shuffle(layout->slots + t * padded, padded);
    return;
  }
  // Every thread has the rows (columns) that it has elements of, in their order.
  struct shape whole = *s;
  whole.role = DESTINATION;
  uint32_t slots = apple_capacity(s);
  layout->capacity = 0;
  layout->slots = take(padded * s->threads);
  for (uint32_t t = 0; t < s->threads; ++t) {
    uint64_t seen[16] = {0};
    uint32_t* mine = layout->slots + t * layout->capacity;
    for (uint32_t i = 0; i < slots; ++i) {
      uint32_t row, column;
      apple_place(&whole, t, i, &row, &column);
      uint32_t at = by_rows ? row : column;
      if (at < 1024) seen[at / 64] |= 1ull << at % 64;
    }
    uint32_t found = 0;
    for (uint32_t at = 0; at < padded; ++at)
      if (seen[at / 64] >> at % 64 & 1) mine[found++] = at < count ? at : INVALID;
    layout->capacity = found;  // the same for every thread
  }
}

static void place_linear(struct mh_layout* layout) {
  const struct shape* s = &layout->shape;
  uint32_t elements = s->rows * s->columns, count;
  layout->capacity = ceil_div(elements, s->threads), count = layout->capacity * s->threads;
  layout->slots = take(count);
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t element = i % layout->capacity * s->threads + i / layout->capacity;
    layout->slots[i] = element < elements ? element : INVALID;
  }
}

static const struct mh_layout* layout_of(uint64_t key) {
  for (uint32_t i = 0; i < layout_count; ++i)
    if (layouts[i].key == key) return &layouts[i];
  if (layout_count == LAYOUTS) __builtin_trap();
  struct mh_layout* layout = &layouts[layout_count++];
  layout->key = key;
  struct shape* s = &layout->shape;
  s->role = (enum role)(key & 7), s->transposed = key >> 3 & 1, s->threads = key >> 32 & 0x7ff;
  s->columns = key >> 4 & 0x3fff, s->rows = key >> 18 & 0x3fff;
  uint64_t salted = key;
  if (alike() && s->role <= DESTINATION) salted = key & ~0xfull & 0x7ffffffffffull;  // of the shape alone
  seed(drawn(), salted);
  if (s->role == LINEAR)
    place_linear(layout);
  else if (s->role == ROWS || s->role == COLUMNS)
    place_reduction(layout);
  else if (drawn())
    draw_tensor(layout);
  else
    place_tensor(layout);
  return layout;
}

static uint32_t index_in_scope(uint32_t threads) {
  return threads == 1 ? 0 : threads == MH_LANES ? __mh_self.lane : __mh_self.thread;
}
static uint32_t element_of(const struct mh_layout* layout, uint32_t thread, uint32_t slot) {
  if (slot >= layout->capacity || thread >= layout->shape.threads) return INVALID;
  return layout->slots[thread * layout->capacity + slot];
}

// What include/msl/cpu_tensor.h asks for.
const struct mh_layout* __mh_tensor_layout(uint64_t key) { return layout_of(key); }
uint32_t __mh_tensor_capacity(const struct mh_layout* layout) { return layout->capacity; }
uint32_t __mh_tensor_element(const struct mh_layout* layout, uint32_t slot) {
  return element_of(layout, index_in_scope(layout->shape.threads), slot);
}
uint32_t __mh_tensor_memory_accumulates(void) { return drawn() % 4 < 2; }
static uint32_t find(const struct mh_layout* layout, uint32_t thread, uint32_t element) {
  for (uint32_t i = 0; i < layout->capacity; ++i)
    if (element_of(layout, thread, i) == element) return i;
  return INVALID;
}
uint32_t __mh_tensor_find(const struct mh_layout* layout, uint32_t element) {
  return find(layout, index_in_scope(layout->shape.threads), element);
}
uint32_t __mh_tensor_maps(const struct mh_layout* from, const struct mh_layout* to) {
  if (from->shape.rows != to->shape.rows || from->shape.columns != to->shape.columns) return false;
  for (uint32_t t = 0; t < from->shape.threads; ++t)
    for (uint32_t i = 0; i < from->capacity; ++i) {
      uint32_t element = element_of(from, t, i), columns = from->shape.columns;
      if (element == INVALID) continue;
      if (to->shape.role == ROWS) element /= columns;
      if (to->shape.role == COLUMNS) element %= columns;
      if (find(to, t, element) == INVALID) return false;
    }
  return true;
}
uint32_t __mh_tensor_same(const struct mh_layout* a, const struct mh_layout* b) {
  const struct shape *s = &a->shape, *t = &b->shape;
  return s->rows == t->rows && s->columns == t->columns && s->threads == t->threads && a->capacity == b->capacity &&
         !__builtin_memcmp(a->slots, b->slots, (size_t)a->capacity * s->threads * sizeof *a->slots);
}
void __mh_check_slot(const struct mh_layout* layout, uint32_t slot) {
  if (slot < layout->capacity) return;
  struct mh_report* r = mh_new_report(MH_SLOT, (uint64_t)__builtin_return_address(0), 0);
  if (r) r->index = (int32_t)slot, r->size = layout->capacity;
  mh_abandon();  // the slot may not exist
}
void __mh_report_tensor(uint32_t fault) {
  mh_new_report((enum mh_fault)fault, (uint64_t)__builtin_return_address(0), 0);
}

// The slots of the threads [first, first + count) that take part, in a dense matrix; what nobody brings is NaN.
struct scope {
  uint32_t first, count, lanes;  // lanes: of one simdgroup that are active, or all bits
  uint64_t site;
};
static const struct mh_tensor_request* request_of(const struct scope* scope, uint32_t i) {
  const struct mh_fiber* fiber = &mh.fibers[scope->first + i];
  if (!(scope->lanes >> i % MH_LANES & 1) || fiber->waiting_in != MH_TENSOR) return 0;
  return !scope->site || fiber->site == scope->site ? fiber->in : 0;
}

static uint32_t dense[3][DENSE];
static void collect(const struct scope* scope, int operand, const struct mh_layout* layout) {
  uint32_t elements = layout->shape.rows * layout->shape.columns;
  if (elements > DENSE) __builtin_trap();
  for (uint32_t i = 0; i < elements; ++i) dense[operand][i] = NAN_WORD;
  for (uint32_t t = 0; t < scope->count; ++t) {
    const struct mh_tensor_request* request = request_of(scope, t);
    for (uint32_t i = 0; request && i < layout->capacity; ++i) {
      uint32_t element = element_of(layout, t, i);
      if (element != INVALID) dense[operand][element] = request->words[operand][i];
    }
  }
}
static void distribute(const struct scope* scope, int operand, const struct mh_layout* layout, uint32_t padding) {
  for (uint32_t t = 0; t < scope->count; ++t) {
    const struct mh_tensor_request* request = request_of(scope, t);
    for (uint32_t i = 0; request && i < layout->capacity; ++i) {
      uint32_t element = element_of(layout, t, i);
      request->words[operand][i] = element == INVALID ? padding : dense[operand][element];
    }
  }
}

static void transpose(uint32_t* matrix, uint32_t rows, uint32_t columns) {
  static uint32_t copy[DENSE];
  memcpy(copy, matrix, (size_t)rows * columns * sizeof *copy);
  for (uint32_t r = 0; r < rows; ++r)
    for (uint32_t c = 0; c < columns; ++c) matrix[c * rows + r] = copy[r * columns + c];
}

#define MULTIPLY(T)                                                                    \
  do {                                                                                 \
    const T *a = (const T*)dense[0], *b = (const T*)dense[1];                          \
    T* d = (T*)dense[2];                                                               \
    for (uint32_t r = 0; r < m; ++r)                                                   \
      for (uint32_t i = 0; i < k; ++i)                                                 \
        for (uint32_t c = 0; c < n; ++c) d[r * n + c] += a[r * k + i] * b[i * n + c];   \
  } while (0)

static void product(const struct scope* scope, const struct mh_tensor_request* request) {
  const struct mh_layout *left = request->layouts[0], *right = request->layouts[1], *destination = request->layouts[2];
  uint32_t m = destination->shape.rows, n = destination->shape.columns;
  uint32_t k = left->shape.transposed ? left->shape.rows : left->shape.columns;
  collect(scope, 0, left), collect(scope, 1, right);
  if (left->shape.transposed) transpose(dense[0], k, m);
  if (right->shape.transposed) transpose(dense[1], n, k);
  if (request->accumulate)
    collect(scope, 2, destination);
  else
    memset(dense[2], 0, (size_t)m * n * sizeof(uint32_t));
  if (request->integer)
    MULTIPLY(int32_t);
  else
    MULTIPLY(float);
  distribute(scope, 2, destination, request->integer ? POISON : NAN_WORD);
  mh.launch->counters.matrix_products += ((uint64_t)m * n * k + 511) / 512;
}

#define REDUCE(T)                                                                               \
  do {                                                                                          \
    const T* from = (const T*)dense[0];                                                         \
    T* to = (T*)dense[2];                                                                       \
    for (uint32_t i = 0; i < (by_rows ? rows : columns); ++i) {                                 \
      memcpy(&to[i], &request->identity, sizeof(T));                                            \
      for (uint32_t j = 0; j < (by_rows ? columns : rows); ++j) {                               \
        T x = from[by_rows ? i * columns + j : j * columns + i];                                \
        to[i] = request->reduce == MH_SUM ? to[i] + x                                           \
                : (request->reduce == MH_MAX ? x > to[i] : x < to[i]) || x != x ? x : to[i];    \
      }                                                                                         \
    }                                                                                           \
  } while (0)

static void reduction(const struct scope* scope, const struct mh_tensor_request* request) {
  const struct mh_layout *source = request->layouts[0], *destination = request->layouts[2];
  uint32_t rows = source->shape.rows, columns = source->shape.columns;
  bool by_rows = destination->shape.role == ROWS;
  collect(scope, 0, source);
  if (request->integer)
    REDUCE(int32_t);
  else
    REDUCE(float);
  distribute(scope, 2, destination, request->integer ? POISON : NAN_WORD);
  mh.launch->counters.reductions++;
}

void mh_perform_tensor(uint32_t first, uint32_t count, uint32_t lanes) {
  struct scope scope = {first, count, lanes, 0};
  const struct mh_tensor_request* request = 0;
  for (uint32_t i = 0; i < count && !request; ++i) {
    request = request_of(&scope, i);
    scope.site = mh.fibers[first + i].site;
  }
  if (request) (request->reduce == MH_PRODUCT ? product : reduction)(&scope, request);
}
