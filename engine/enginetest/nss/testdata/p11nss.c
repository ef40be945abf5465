// A PKCS #11 module for tests: NSS's softokn, which is told in C_Initialize where
// its databases are.
//
//   P11NSS_MODULE      softokn
//   P11NSS_PARAMETERS  what it is told
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>

#define CK_PTR *
#define CK_DECLARE_FUNCTION(type, name) type name
#define CK_DECLARE_FUNCTION_POINTER(type, name) type(*name)
#define CK_CALLBACK_FUNCTION(type, name) type(*name)
#define NULL_PTR NULL
#include "pkcs11.h"

static CK_FUNCTION_LIST *nss;
static CK_FUNCTION_LIST ours;

// NSS's CK_C_INITIALIZE_ARGS has one member more, before the reserved one.
struct arguments {
	void *mutexes[4];
	CK_FLAGS flags;
	char *parameters;
	void *reserved;
};

static CK_RV initialize(CK_VOID_PTR ignored)
{
	struct arguments args = {{NULL}, CKF_OS_LOCKING_OK, getenv("P11NSS_PARAMETERS"), NULL};
	(void)ignored;
	return nss->C_Initialize(&args);
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list)
{
	void *library = dlopen(getenv("P11NSS_MODULE"), RTLD_NOW | RTLD_LOCAL);
	CK_C_GetFunctionList get = library ? (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList") : NULL;
	if (!get || get(&nss) != CKR_OK)
		return CKR_GENERAL_ERROR;
	ours = *nss;
	ours.C_Initialize = initialize;
	ours.C_GetFunctionList = C_GetFunctionList;
	*list = &ours;
	return CKR_OK;
}
