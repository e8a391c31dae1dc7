// Linked into every kernel's library: where its records of threadgroup variables lie.
struct record;
#if defined(__APPLE__)
extern const struct record start __asm("section$start$__DATA$mh_tg"), stop __asm("section$end$__DATA$mh_tg");
#else
extern const struct record start __asm("__start_mh_tg") __attribute__((weak, visibility("hidden")));
extern const struct record stop __asm("__stop_mh_tg") __attribute__((weak, visibility("hidden")));
#endif
__attribute__((visibility("default"))) void __mh_records(const struct record** first, const struct record** last) {
  *first = &start;
  *last = &stop;
}
