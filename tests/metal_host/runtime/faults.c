#include "runtime.h"
void mh_check_barrier(void) {}
void mh_check_collective(struct mh_simdgroup* s, uint32_t b, uint32_t l) { (void)s; (void)b; (void)l; }
struct mh_report* mh_new_report(enum mh_fault f, uint64_t s, uint64_t o) { (void)f; (void)s; (void)o; return 0; }
