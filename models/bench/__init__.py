"""What ``qerve bench`` measures below the engine: limits of the machine, operators, llama.cpp."""
