from benchmarks.render.command import main

main()
