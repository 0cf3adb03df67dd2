"""Operations in C++ for CPUs with AVX2: `library` compiles, calls and records them, `operations` is their side in Python."""
