// An empty Python module: importing it loads the library, whose static initialisers register the kernels.
#include <Python.h>

#define MMCOMPRESS_INIT_(name) PyInit_##name
#define MMCOMPRESS_INIT(name) MMCOMPRESS_INIT_(name)

PyMODINIT_FUNC MMCOMPRESS_INIT(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "mmcompress kernels", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
