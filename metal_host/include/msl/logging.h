// <metal_logging>: what a kernel logs goes nowhere.
#pragma once

namespace metal {

enum log_type { log_type_debug, log_type_info, log_type_default, log_type_error, log_type_fault };

struct os_log {
  constexpr os_log(const constant char*, const constant char*) constant {}
  constexpr os_log(const constant char*, const constant char*) {}
#define __MH_LOG(name, space)                    \
  template <typename... A>                       \
  void log##name(const constant char*, A...) const space {}
#define __MH_LOGS(space)      \
  __MH_LOG(_debug, space)     \
  __MH_LOG(_info, space)      \
  __MH_LOG(, space)           \
  __MH_LOG(_error, space)     \
  __MH_LOG(_fault, space)     \
  template <typename... A>    \
  void log_with_type(log_type, const constant char*, A...) const space {}
  __MH_LOGS(thread)
  __MH_LOGS(constant)
#undef __MH_LOG
#undef __MH_LOGS
};
constant os_log os_log_default("", "");

}  // namespace metal
