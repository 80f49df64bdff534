// The kernels that this machine can run: what a case goes through.
#pragma once

#include <vector>

#include "context.h"
#include "test.h"

namespace qerve_test {

inline std::vector<const qerve::Kernels*> runnable_kernels() {
    std::vector<const qerve::Kernels*> tables;
    for (const qerve::Isa isa : runnable_isas()) tables.push_back(qerve::table_of(isa));
    return tables;
}

}  // namespace qerve_test
