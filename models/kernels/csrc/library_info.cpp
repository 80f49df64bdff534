// The C interface to the library's version and instruction sets.
#include "library_info.h"

#include <cstdio>

#include "cpu_features.h"

namespace {

void copy_text(const std::string& text, char* out, int32_t size) {
    if (out != nullptr && size > 0) std::snprintf(out, static_cast<size_t>(size), "%s", text.c_str());
}

}  // namespace

int32_t qerve_abi_version(void) { return QERVE_ABI_VERSION; }

const char* qerve_isa_best(void) { return qerve_isa_choose(nullptr, nullptr, 0); }

const char* qerve_isa_choose(const char* forced, char* error, int32_t error_size) {
    const qerve::IsaChoice choice = qerve::choose_isa(forced);
    if (!choice.isa) copy_text(choice.error, error, error_size);
    return choice.isa ? qerve::isa_name(*choice.isa) : nullptr;
}

void qerve_isa_compiled(char* names, int32_t size) { copy_text(qerve::isa_names(qerve::compiled_isas()), names, size); }
