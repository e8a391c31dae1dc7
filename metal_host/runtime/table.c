// Linked into every kernel's library: where its records of threadgroup variables and its constant data lie.
#if defined(__APPLE__)
extern const char records_start __asm("section$start$__DATA$mh_tg"), records_end __asm("section$end$__DATA$mh_tg");
extern const char constants_start __asm("section$start$__TEXT$__const"), constants_end
    __asm("section$end$__TEXT$__const");
#else
#define HIDDEN __attribute__((weak, visibility("hidden")))
extern const char records_start __asm("__start_mh_tg") HIDDEN, records_end __asm("__stop_mh_tg") HIDDEN;
extern const char constants_start __asm("__ehdr_start") HIDDEN, constants_end __asm("etext") HIDDEN;
#endif
#define EXPORT __attribute__((visibility("default")))

EXPORT void __mh_records(const char** first, const char** last) {
  *first = &records_start;
  *last = &records_end;
}

EXPORT void __mh_constants(const char** first, const char** last) {
  *first = &constants_start;
  *last = &constants_end;
}
