/* What the loader asks of the library before it uses anything else: its version and its instruction sets. */
#ifndef QERVE_LIBRARY_INFO_H
#define QERVE_LIBRARY_INFO_H

#include "qerve_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Name of the best instruction set that is compiled in and runs here. */
QERVE_EXPORT const char* qerve_isa_best(void);

/* Name of the set called `forced`, or of the best one where that is NULL or empty.
 * NULL with a text in `error` where there is no such set, or this machine cannot run it. */
QERVE_EXPORT const char* qerve_isa_choose(const char* forced, char* error, int32_t error_size);

/* Names of the compiled sets, joined by ", ", the preferred one first; cut off at `size` bytes. */
QERVE_EXPORT void qerve_isa_compiled(char* names, int32_t size);

#ifdef __cplusplus
}
#endif
#endif
