// A PKCS #11 module for tests that stands before a real one and misbehaves.
//
//   P11FAULT_MODULE  the real module
//   P11FAULT_SERVER  the process whose children are killed when the device is lost;
//                    without it the loss is only said
//   P11FAULT_DIR     a directory in which each file is a fault:
//
//     extractable  every generated key is extractable and not sensitive
//     weaker       every generated key is on P-256 or has 2048 bits
//     raw-point    CKA_EC_POINT is not wrapped in an OCTET STRING
//     flags        content: a number that is or-ed into every token's flags
//     serial       content: the serial number of every token
//     return       content: "<function> before|after <value>": the function is not
//                  called, or is, and returns the value. Once: the file goes
//     lose         content: "<function>": it is called, and then the device is gone
//                  until C_Finalize. Once: the file goes
//     kill         content: "<function>" or "<function> server": before it is called the
//                  children of P11FAULT_SERVER are killed, or that too. Once: the file goes
//     wait         content: "<function>": it is not called before the file goes, or a minute has
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CK_PTR *
#define CK_DECLARE_FUNCTION(type, name) type name
#define CK_DECLARE_FUNCTION_POINTER(type, name) type(*name)
#define CK_CALLBACK_FUNCTION(type, name) type(*name)
#define NULL_PTR NULL
#include "pkcs11.h"

typedef CK_RV (*function)(CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG);

static CK_FUNCTION_LIST *real;
static CK_FUNCTION_LIST ours;
static int dead;

static int fault(const char *name, char *content, size_t size)
{
	char path[4096];
	snprintf(path, sizeof path, "%s/%s", getenv("P11FAULT_DIR"), name);
	FILE *file = fopen(path, "r");
	if (!file)
		return 0;
	size_t n = fread(content, 1, size - 1, file);
	content[n] = 0;
	fclose(file);
	return 1;
}

static void over(const char *name)
{
	char path[4096];
	snprintf(path, sizeof path, "%s/%s", getenv("P11FAULT_DIR"), name);
	unlink(path);
}

// Whether the function returns something else, and what.
static int returns(const char *name, const char *when, CK_RV *value)
{
	char content[256], wanted[64], at[16];
	unsigned long number;
	if (!fault("return", content, sizeof content) || sscanf(content, "%63s %15s %li", wanted, at, &number) != 3 ||
	    strcmp(wanted, name) || strcmp(at, when))
		return 0;
	over("return");
	*value = number;
	return 1;
}

// Kills what the real module talks to, and perhaps what would start it again.
static void lose(const char *server, int all)
{
	char path[64];
	long pid;
	if (all)
		kill(atol(server), SIGSTOP); // that it starts no other meanwhile
	snprintf(path, sizeof path, "/proc/%s/task/%s/children", server, server);
	FILE *children = fopen(path, "r");
	if (!children)
		return;
	while (fscanf(children, "%ld", &pid) == 1)
		kill(pid, SIGKILL);
	fclose(children);
	if (all)
		kill(atol(server), SIGKILL);
}

static CK_RV after(const char *name, CK_RV rv)
{
	char content[256];
	if (!strcmp(name, "C_Finalize"))
		dead = 0;
	if (fault("lose", content, sizeof content) && !strcmp(content, name)) {
		over("lose");
		if (getenv("P11FAULT_SERVER"))
			lose(getenv("P11FAULT_SERVER"), 0);
		else
			dead = 1;
		return CKR_DEVICE_REMOVED;
	}
	CK_RV value;
	return returns(name, "after", &value) ? value : rv;
}

// Every function, as p11crash has it: generic, since no function has more than
// eight arguments. The special ones are called below.
static CK_RV special(const char *name, CK_ULONG *a, CK_RV rv);

static void prepare(const char *name, CK_ULONG *a);

#define CK_PKCS11_FUNCTION_INFO(name) \
	static CK_RV p11fault_##name(CK_ULONG a, CK_ULONG b, CK_ULONG c, CK_ULONG d, \
				     CK_ULONG e, CK_ULONG f, CK_ULONG g, CK_ULONG h) \
	{ \
		CK_RV value; \
		CK_ULONG all[] = {a, b, c, d, e, f, g, h}; \
		if (dead && strcmp(#name, "C_Finalize")) \
			return CKR_DEVICE_REMOVED; \
		if (returns(#name, "before", &value)) \
			return value; \
		prepare(#name, all); \
		value = ((function)(void *)real->name)(all[0], all[1], all[2], all[3], all[4], all[5], all[6], all[7]); \
		return after(#name, special(#name, all, value)); \
	}
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO

static void prepare(const char *name, CK_ULONG *a)
{
	static CK_BBOOL yes = CK_TRUE, no = CK_FALSE;
	static CK_ULONG bits = 2048;
	static CK_BYTE p256[] = {0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07};
	char content[256], wanted[64], server[16];
	for (int i = 0; i < 6000 && fault("wait", content, sizeof content) && !strcmp(content, name); i++)
		usleep(10000);
	int words = fault("kill", content, sizeof content) ? sscanf(content, "%63s %15s", wanted, server) : 0;
	if (words > 0 && !strcmp(wanted, name)) {
		over("kill");
		lose(getenv("P11FAULT_SERVER"), words > 1);
	}
	if (strcmp(name, "C_GenerateKeyPair"))
		return;
	CK_ATTRIBUTE *public = (CK_ATTRIBUTE *)a[2];
	for (CK_ULONG i = 0; fault("weaker", content, sizeof content) && i < a[3]; i++) {
		if (public[i].type == CKA_MODULUS_BITS)
			public[i].pValue = &bits;
		if (public[i].type == CKA_EC_PARAMS)
			public[i].pValue = p256, public[i].ulValueLen = sizeof p256;
	}
	if (!fault("extractable", content, sizeof content))
		return;
	CK_ATTRIBUTE *private = (CK_ATTRIBUTE *)a[4]; // session, mechanism, public, its count, private, its count
	for (CK_ULONG i = 0; i < a[5]; i++) {
		if (private[i].type == CKA_EXTRACTABLE)
			private[i].pValue = &yes;
		if (private[i].type == CKA_SENSITIVE)
			private[i].pValue = &no;
	}
}

static CK_RV special(const char *name, CK_ULONG *a, CK_RV rv)
{
	char content[64];
	if (rv != CKR_OK)
		return rv;
	if (!strcmp(name, "C_GetTokenInfo") && fault("flags", content, sizeof content))
		((CK_TOKEN_INFO *)a[1])->flags |= strtoul(content, NULL, 0);
	if (!strcmp(name, "C_GetTokenInfo") && fault("serial", content, sizeof content)) {
		CK_CHAR *serial = ((CK_TOKEN_INFO *)a[1])->serialNumber; // padded with blanks
		memset(serial, ' ', sizeof ((CK_TOKEN_INFO *)0)->serialNumber);
		memcpy(serial, content, strnlen(content, sizeof ((CK_TOKEN_INFO *)0)->serialNumber));
	}
	if (!strcmp(name, "C_GetAttributeValue") && fault("raw-point", content, sizeof content)) {
		CK_ATTRIBUTE *attributes = (CK_ATTRIBUTE *)a[2];
		for (CK_ULONG i = 0; i < a[3]; i++)
			if (attributes[i].type == CKA_EC_POINT && attributes[i].pValue && attributes[i].ulValueLen > 65) {
				CK_ULONG head = attributes[i].ulValueLen > 129 ? 3 : 2; // its length is one octet up to 127
				memmove(attributes[i].pValue, (char *)attributes[i].pValue + head, attributes[i].ulValueLen - head);
				attributes[i].ulValueLen -= head;
			}
	}
	return rv;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list)
{
	const char *module = getenv("P11FAULT_MODULE");
	void *library = module ? dlopen(module, RTLD_NOW | RTLD_LOCAL) : NULL;
	CK_C_GetFunctionList get = library ? (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList") : NULL;
	if (!get || get(&real) != CKR_OK) {
		fprintf(stderr, "p11fault: P11FAULT_MODULE is not a PKCS #11 module\n");
		return CKR_GENERAL_ERROR;
	}
	ours.version = real->version;
#define CK_PKCS11_FUNCTION_INFO(name) ours.name = (CK_##name)(void *)p11fault_##name;
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
	ours.C_GetFunctionList = C_GetFunctionList;
	*list = &ours;
	return CKR_OK;
}
