"""Measuring: latency, throughput, memory and bytes of two models on the device at hand."""

if __name__ == "bench":
    raise ImportError("import it as dotexport.bench: a bare `bench` would clash with others")
