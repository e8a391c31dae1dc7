#include "runtime.h"
void mh_begin_threadgroup(void) {}
