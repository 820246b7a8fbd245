from benchmarks.coverage.command import main

main()
