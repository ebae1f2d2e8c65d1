/* What the files of `offload._fast` share. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

/* offload.ledger.Claim, for a holder that notes its end by itself. */
typedef struct {
    PyObject_HEAD
    Py_ssize_t key, num_bytes, added_bytes;
    PyObject *row; /* may be NULL */
    int is_booked; /* whether its begin is, and its end is not */
} Claim;

extern PyTypeObject ClaimType, BooksType, ReaderType;

int ready_books(void);

Py_ssize_t number_of(PyObject *owner, PyObject *name, int is_method);
