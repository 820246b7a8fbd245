from benchmarks.gpu_check.command import main

main()
