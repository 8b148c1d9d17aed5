from qnext.cli import main

main()
