// Runs the registered cases: qerve_cpu_tests [PART_OF_A_NAME...]. Exit status 1 if one fails, or none matches.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <mutex>

#include "test.h"

namespace qerve_test {

namespace {

struct NamedCase {
    const char* name;
    Case run;
};

enum class Outcome { passed, skipped, failed };

struct Running {
    std::mutex mutex;
    int num_failures = 0;
    std::string skip_reason;
};

// Function-local: cases register while the program's global objects are made, in any order.
std::vector<NamedCase>& cases() {
    static std::vector<NamedCase> all;
    return all;
}

Running& running() {
    static Running state;
    return state;
}

bool matches(const char* name, int argc, char** argv) {
    return argc < 2 || std::any_of(argv + 1, argv + argc, [name](const char* part) {
               return std::string(name).find(part) != std::string::npos;
           });
}

Outcome run(const NamedCase& item) {
    running().num_failures = 0;
    running().skip_reason.clear();
    try {
        item.run();
    } catch (const std::exception& error) {
        report_failure(item.name, 0, std::string("exception: ") + error.what());
    }
    if (running().num_failures > 0) return Outcome::failed;
    return running().skip_reason.empty() ? Outcome::passed : Outcome::skipped;
}

void print_machine() {
    const qerve::IsaChoice best = qerve::choose_isa(nullptr);
    std::printf("compiled: %s; best here: %s\n", qerve::isa_names(qerve::compiled_isas()).c_str(),
                best.isa ? qerve::isa_name(*best.isa) : best.error.c_str());
}

}  // namespace

void report_failure(const char* file, int line, const std::string& text) {
    const std::lock_guard<std::mutex> lock(running().mutex);
    // A broken kernel fails in every element: the first ones tell enough.
    if (++running().num_failures <= 10) std::printf("%s:%d: %s\n", file, line, text.c_str());
}

void report_skip(const std::string& reason) { running().skip_reason = reason; }

std::vector<qerve::Isa> runnable_isas() {
    std::vector<qerve::Isa> isas;
    for (int i = 0; i < qerve::kNumIsas; ++i) {
        const qerve::Isa isa = static_cast<qerve::Isa>(i);
        if (qerve::choose_isa(qerve::isa_name(isa)).isa) isas.push_back(isa);
    }
    return isas;
}

Registration::Registration(const char* name, Case run) { cases().push_back({name, run}); }

}  // namespace qerve_test

int main(int argc, char** argv) {
    using namespace qerve_test;
    print_machine();
    int num_run = 0, num_failed = 0, num_skipped = 0;
    for (const NamedCase& item : cases()) {
        if (!matches(item.name, argc, argv)) continue;
        std::printf("%s\n", item.name);
        std::fflush(stdout);  // if the process dies in it, the last name says where
        const Outcome outcome = run(item);
        ++num_run;
        num_failed += outcome == Outcome::failed;
        num_skipped += outcome == Outcome::skipped;
        if (outcome == Outcome::failed) std::printf("    FAILED\n");
        if (outcome == Outcome::skipped) std::printf("    skipped: %s\n", running().skip_reason.c_str());
    }
    std::printf("%d cases, %d failed, %d skipped\n", num_run, num_failed, num_skipped);
    return num_failed > 0 || num_run == 0;
}
