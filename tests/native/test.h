// A small test runner: QERVE_TEST(name) { CHECK(...); } anywhere below tests/native is found and run.
#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "cpu_features.h"

namespace qerve_test {

// Fails the running case and lets it go on; safe to call from several threads.
void report_failure(const char* file, int line, const std::string& text);

// The case ends as skipped when it returns, unless a check failed.
void report_skip(const std::string& reason);

// Instruction sets that are compiled in and that this machine can run: a kernel's cases go through all of them.
std::vector<qerve::Isa> runnable_isas();

using Case = void (*)();

struct Registration {
    Registration(const char* name, Case run);
};

template <typename A, typename B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
    if (a == b) return;
    std::ostringstream message;
    message << text << ": " << a << " and " << b;
    report_failure(file, line, message.str());
}

}  // namespace qerve_test

#define QERVE_TEST(name)                                                     \
    static void name();                                                      \
    static const qerve_test::Registration name##_registration(#name, &name); \
    static void name()

#define CHECK(condition) \
    ((condition) ? (void)0 : qerve_test::report_failure(__FILE__, __LINE__, #condition " does not hold"))

#define CHECK_EQUAL(a, b) qerve_test::check_equal((a), (b), #a " == " #b, __FILE__, __LINE__)

#define SKIP(reason)                     \
    do {                                 \
        qerve_test::report_skip(reason); \
        return;                          \
    } while (false)
