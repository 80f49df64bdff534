"""What the native kernels are here, in words for tables, logs and clients."""

from .backend import NativeBackend


def describe_native(backend: NativeBackend) -> dict[str, str]:
    """Instruction set, threads and rounding of inputs; or only why the kernels are not here."""
    runtime = backend.runtime
    if isinstance(runtime, str):
        return {"native kernels": runtime}
    return {
        "native kernels": f"{runtime.isa} (built for {', '.join(runtime.library.compiled_isas)})",
        "threads": f"{runtime.num_threads} ({runtime.threads.reason})",
        "inputs": f"{backend.activation_bits} bits per row and 32 or 64 channels, where the artifact has no scheme",
    }
