def pytest_addoption(parser):
    parser.addoption(
        "--metal-device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where tests/test_metal_host runs its Metal kernels",
    )
