/* Four-byte scalars whose lower halves are zero, as float32 made from bfloat16 are: their upper halves, in one
 * pass. A cast, a cast back and a comparison are three, with two more tensors.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

enum { MOST_AT_ONCE = 4096 }; /* scalars between two looks at what was found */

/* Write the upper halves of `num` scalars; return whether all lower ones are zero. */
static int split(const uint32_t *whole, uint16_t *upper, Py_ssize_t num)
{
    uint32_t lower = 0;
    for (Py_ssize_t first = 0; first < num && lower == 0; first += MOST_AT_ONCE) {
        Py_ssize_t stop = num - first < MOST_AT_ONCE ? num : first + MOST_AT_ONCE;
        for (Py_ssize_t i = first; i < stop; i++) {
            upper[i] = (uint16_t)(whole[i] >> 16);
            lower |= whole[i] & 0xffff;
        }
    }
    return lower == 0;
}

static PyObject *upper_halves(PyObject *self, PyObject *const *args, Py_ssize_t num_args)
{
    if (num_args != 3) {
        PyErr_SetString(PyExc_TypeError, "upper_halves takes two addresses and the number of scalars");
        return NULL;
    }
    const uint32_t *whole = PyLong_AsVoidPtr(args[0]);
    uint16_t *upper = PyLong_AsVoidPtr(args[1]);
    Py_ssize_t num = PyLong_AsSsize_t(args[2]);
    if (PyErr_Occurred())
        return NULL;
    int is_all;
    Py_BEGIN_ALLOW_THREADS
    is_all = split(whole, upper, num);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(is_all);
}

static PyMethodDef methods[] = {
    {"upper_halves", (PyCFunction)(void (*)(void))upper_halves, METH_FASTCALL,
     "Write the upper halves of four-byte scalars; return whether their lower halves are all zero."},
    {NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "offload.codecs._halves",
    .m_doc = "Float32 scalars that bfloat16 holds.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__halves(void)
{
    return PyModuleDef_Init(&module);
}
